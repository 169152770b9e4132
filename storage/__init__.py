"""Where bytes live: records, blobs, image shards, latent sets, lineage. Knows no network, no torch and no Ray."""
