"""Songs to hear, from vectors and ratings."""
