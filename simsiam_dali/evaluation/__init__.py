"""What the vectors tell about songs, beside baselines."""
