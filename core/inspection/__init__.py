"""Who goes where: what every expert reads, as one JSON document and as one HTML page."""
