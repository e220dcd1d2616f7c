"""Publishing packed models on the Hugging Face Hub."""
