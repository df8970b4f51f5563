"""What a process runs on: device, distributed processes, OS signals."""
