"""What the scripts that need SGLang share: a tiny checkpoint, servers, evidence."""
