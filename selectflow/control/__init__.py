"""Control of horizon and learning rate: rules on plain numbers, and what they measure."""
