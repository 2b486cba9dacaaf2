"""Search in one's own photos: vectors of all are made once, and what is nearest to a sentence or a photo is looked at closely."""
