"""What happens to checkpoints afterwards: ``recover.py`` after a crash, ``retention.py`` for old ones."""
