from moecc.cli import main

main()
