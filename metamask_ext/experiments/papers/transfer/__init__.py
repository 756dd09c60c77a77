"""Transfer learning with convolutional networks: which layers to retrain, by the size of the data."""
