"""One file per stage: read storage, fan out on Ray, call the pipeline, commit to storage. Also the command line."""
