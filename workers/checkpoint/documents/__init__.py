"""The documents of a checkpoint and of its save, without reading or writing them: names, manifest, receipt."""
