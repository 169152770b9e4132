"""Networks, entropy models, the integer hyper synthesis and checkpoint bytes."""
