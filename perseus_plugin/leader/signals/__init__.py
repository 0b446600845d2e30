"""What does somebody outside want of the job at this hour, and what is energy worth then?"""
