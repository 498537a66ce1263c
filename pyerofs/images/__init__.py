"""Between sources and the format: combining an image and its extra devices."""
