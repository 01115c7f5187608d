"""surgery/anatomies."""
