"""How predictions become numbers and pictures: answers compared, precisions, and harnesses of others."""
