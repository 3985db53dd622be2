from portcullis_client.cli.main import main

main()
