"""Base models: from a folder, the hub or a config, and the heads that tasks put on a backbone."""
