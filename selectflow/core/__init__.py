"""The mathematics: tensors and plain numbers, no configuration."""
