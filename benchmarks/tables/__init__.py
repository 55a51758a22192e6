"""What `auto` goes by: kernels/measured/*.json, and the user's own table."""
