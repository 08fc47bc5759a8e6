"""What an update of a weight is, and how it runs beside or inside its layer. Torch only: nothing here knows PEFT."""
