"""What every storage has to do, whatever keeps the bytes."""
