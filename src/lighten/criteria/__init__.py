"""What a weight is worth: (weight (out, in), stats) -> score (out, in), the higher the more."""
