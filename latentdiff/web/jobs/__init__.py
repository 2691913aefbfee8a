"""What requests compute: in a process of its own, which never imports gradio. See `process`."""
