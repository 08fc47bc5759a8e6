"""What a comparison needs and PEFT lacks."""
