"""The training and finetuning loops."""
