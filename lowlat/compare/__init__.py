"""Two implementations beside each other: where they first differ, by how much, and why."""
