"""How predictions become numbers and pictures: for texts, for boxes and masks, and by harnesses of other projects."""
