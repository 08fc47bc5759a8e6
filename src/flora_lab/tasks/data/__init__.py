"""What examples are made of: `records` splits and checks them, and each kind of data has a file that reads it."""
