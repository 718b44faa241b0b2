"""What happens to checkpoints afterwards: ``recover.py`` after a crash, ``retention.py`` and ``removal.py`` for old ones."""
