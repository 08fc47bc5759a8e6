"""What a comparison sets FLoRA against: rivals as installed packages, and what no package has, written from papers."""
