"""What report.html is made of: our page, style and scripts, and 3Dmol.js (README.md)."""
