"""Programs compiled for TPUs that are not here, and what their compiler says of them."""
