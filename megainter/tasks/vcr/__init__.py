"""Visual commonsense reasoning: four-way choices."""
