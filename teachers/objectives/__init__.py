"""What teachers and tokenizers learn; one file each."""
