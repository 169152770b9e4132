"""One file per stage: read from storage, fan out on Ray, call the pipeline, commit to storage. Also the command line."""
