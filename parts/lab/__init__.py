"""What lab.py is made of. Training, quantization and evaluation import nothing of it."""
