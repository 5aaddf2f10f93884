"""What a student learns from: (student, teacher, labels, parts) -> a number to bring down."""
