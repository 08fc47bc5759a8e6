"""The frozen weight: under which name a layer holds it, in which form, and on which device or process it lives."""
