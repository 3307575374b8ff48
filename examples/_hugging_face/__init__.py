"""What `finetune.py` is made of: a checkpoint, its decoder, and packed documents."""
