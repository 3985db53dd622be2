"""`python -m services.fallback_model`: one worker."""

from services.fallback_model.app import main

if __name__ == "__main__":
    main()
