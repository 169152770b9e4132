"""Where bytes live: records, blobs, image shards, latent sets, lineage. Knows no network, torch or Ray."""
