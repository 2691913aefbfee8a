"""The page in the browser: `latentdiff serve`. gradio is imported here alone, and only once the page is made."""
