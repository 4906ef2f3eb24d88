"""What was measured, as a picture: one HTML file that opens offline, or one SVG."""
