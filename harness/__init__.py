"""What a reader may skip: names on the hub, question files, durable runs, pictures. The ideas stand a level up."""
