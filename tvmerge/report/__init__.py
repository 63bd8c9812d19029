"""What a run says of its result: tables, pictures, the model card."""
