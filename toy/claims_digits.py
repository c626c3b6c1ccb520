def main(args, made): pass
