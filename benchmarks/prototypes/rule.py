"""When one of many linear layers should form W' (merged), and when it should use thin products (factored), on an H100.

The constants are seconds, fitted to the measurements of README.md. For another GPU they have to be measured.
"""

WEIGHT = 10e-12  # merged: per number of the weight (stack, add the update, round; project the gradient)
PRODUCT = 12e-15  # merged: per number of the weight and position (the dense gradient)
NUMBER = 10.6e-12  # factored: per number of the input and the output
LAYER = 3e-6  # factored: per layer
LAUNCH = 10e-6  # one launch, as a step of a common host sees it


def merges(outputs: int, inputs: int, positions: int, launch: float = LAUNCH) -> bool:
    """Whether merged costs less than factored, forward and backward, in bf16 or fp16.

    Args:
        positions: rows of the input.
        launch: seconds per launch; 0 compares the time on the GPU alone.
    """
    merged = WEIGHT * outputs * inputs + PRODUCT * positions * outputs * inputs + launch
    factored = LAYER + NUMBER * positions * (outputs + inputs) + 7 * launch
    return merged < factored
