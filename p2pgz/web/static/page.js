fetch("/status")
