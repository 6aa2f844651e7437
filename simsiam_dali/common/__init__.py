"""What every stage uses: errors, processes and devices, files."""
