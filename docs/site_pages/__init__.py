"""What the web site generates from the code: texts in Markdown, by the name that a page's marker uses."""
