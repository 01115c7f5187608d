"""One small file per architecture family; each registers the model types it describes."""
