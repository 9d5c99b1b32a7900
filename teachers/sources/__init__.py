"""Where images, labels and captions come from: data sets on disk and on the hub, folders of images, pixels."""
